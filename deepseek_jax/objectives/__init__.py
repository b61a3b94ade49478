"""What a run learns: the fields of its batch, its loss and what it measures."""
