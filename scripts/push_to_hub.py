"""Publish a run on the Hub: python scripts/push_to_hub.py --run runs/tutorial --repo-id USER/NAME --dry-run"""

if __name__ == "__main__":
    import command

    command.run("push-to-hub")
