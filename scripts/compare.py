"""Compare runs, weights and evaluations: python scripts/compare.py runs/tutorial runs/a3 --picture compared.png"""

if __name__ == "__main__":
    import command

    command.run("compare")
