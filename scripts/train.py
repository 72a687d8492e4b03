"""Train a ResNet: accelerate launch --config_file accelerate_configs/two_gpu.yaml scripts/train.py --recipe tutorial"""

if __name__ == "__main__":
    import command

    command.run("train")
