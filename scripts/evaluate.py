"""Measure the accuracy of saved weights: python scripts/evaluate.py --ckpt runs/tutorial"""

if __name__ == "__main__":
    import command

    command.run("evaluate")
