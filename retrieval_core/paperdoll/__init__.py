"""The paper-doll world: a procedural world with known truth, to train, show and measure with."""
