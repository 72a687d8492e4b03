"""From the form that images come in to one that trains fast: archives, resized copies, shards, verification."""
