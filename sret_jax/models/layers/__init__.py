"""The layers of networks, and blocks of them."""
