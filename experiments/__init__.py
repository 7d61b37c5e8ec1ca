"""The recorded results, the tables made of them, and the programs that measure."""
