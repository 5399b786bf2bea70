"""How much each entry of each axis matters: hooks on a Megatron model, their sums, and Scores. No data, no Plans."""
