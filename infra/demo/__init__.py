"""What the demo and the tiny teacher are made of: real captioned pictures, and a local web server that misbehaves as the real web does."""
