"""The recorded results, the tables made from them, and the programs that measure."""
