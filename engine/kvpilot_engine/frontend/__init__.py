"""What HTTP and the Python API share on the front's side of the socket: tokenise, admit, send, account."""
