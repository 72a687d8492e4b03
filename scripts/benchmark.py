"""Compare this machine's speed with the tutorial's code: python scripts/benchmark.py train --data path/to/images"""

if __name__ == "__main__":
    import command

    command.run("benchmark")
