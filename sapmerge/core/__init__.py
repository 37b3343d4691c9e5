"""What everything is made of: updates, layers, protocols, and the algebra of low rank."""
