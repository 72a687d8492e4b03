"""Print class names and probabilities of images: python scripts/predict.py --ckpt runs/tutorial photographs/ cat.jpg"""

if __name__ == "__main__":
    import command

    command.run("predict")
