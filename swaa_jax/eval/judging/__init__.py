"""Whether an answer is right: scores of text, rules, and a language model that judges."""
