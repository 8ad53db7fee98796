"""What families share: the tables of their parts, and the reading of the config fields behind them."""
