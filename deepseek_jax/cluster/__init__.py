"""Several processes: finding each other, agreeing, noticing who is lost; signals."""
