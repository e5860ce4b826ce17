"""Figures that were published with the released models, to stand beside measured ones.

Source: the release's model cards and blog post. Pairs/s on Natural Questions at max_length 512, best batch size;
nDCG@10 is the mean over NanoBEIR's 13 sets, reranking 100 candidates.
"""

SIZES = ("17m", "32m", "68m", "150m", "400m", "1b")
PAIRS_PER_S = {
    "H100, bf16 FlashAttention-2, unpadded": (7517, 6602, 4913, 3237, 1738, 928),
    "RTX 3090, bf16 FlashAttention-2, unpadded": (9008, 4497, 1916, 982, 429, 189),
    "i7-13700K, fp32": (267.4, 92.5, 31.2, 14.0, 5.2, 2.1),
}
NANOBEIR_NDCG10 = (0.6746, 0.6825, 0.6915, 0.7086, 0.7193, 0.7237)
