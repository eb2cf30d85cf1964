"""The guided model: members, vocabulary alignment, combination, and a causal LM made of them."""
