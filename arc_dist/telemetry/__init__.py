"""What happened: incidents, the log, and the report made from them."""
