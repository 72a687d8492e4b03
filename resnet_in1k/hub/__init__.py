"""Publication: the run folder to a hub folder with its model card, and the upload to the Hub."""
