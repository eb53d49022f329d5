"""What a network does to a ball around its input: its layers, the passes of bounds through them."""
