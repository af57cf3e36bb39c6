"""The studies: comparisons and ablations on real data, their committed results, and the pages made from them."""
