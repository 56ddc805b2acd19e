"""What pages of several stages share: their look, their charts, their parts. A page is one file that asks nothing of any server."""
