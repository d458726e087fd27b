"""How weights are stored: formats, and nothing that computes with them."""
