"""The decoder: mixers, routers, dense weights, tier rules, and the state of a sequence."""
