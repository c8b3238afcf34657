"""Is a property of a network true? A specification read, a network on two engines, a search for a witness, a proof."""
