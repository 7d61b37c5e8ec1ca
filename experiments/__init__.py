"""The papers' recipes as values, the recorded results, and the tables made from them."""
