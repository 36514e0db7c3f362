"""How good a quantised graph is: accuracy, sensitivity, the guard, ranges of later adapters."""
