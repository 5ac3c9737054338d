"""Training on several ranks: who keeps, inverts and applies what."""
