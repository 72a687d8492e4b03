"""Convert, resize, shard or verify images: python scripts/prepare_data.py --verify data/imagenet"""

if __name__ == "__main__":
    import command

    command.run("prepare-data")
