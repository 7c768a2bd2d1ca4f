"""Between two models: WiSE-FT, soups, the exact curve over α, and heads for its untuned end."""
