"""Export weights: python scripts/export.py --ckpt runs/tutorial --format onnx --output resnet50.onnx"""

if __name__ == "__main__":
    import command

    command.run("export")
