"""Full exact rankings per second from text prompts: ``vlrank rerank`` as a whole beside raw ``LLM.generate``.

    python bench/rerank_text.py --model QWEN3_0.6B_FOLDER --out bench/results/rerank_text.json

About 2,048 tokens and 20 candidates per prompt. Variants: ``raw`` (one token per prompt, prompts made beforehand), and
``job`` with ``permutations=P`` (the same history P times: prefix reuse), ``candidates=N`` (9: one trie node; 20: three;
50: sliding windows), ``replicas=N``, ``shard=N``; ``limit=N`` users. ``packed`` is a job on the packed engine, with
``fp8=1`` and ``row=TOKENS`` besides; ``job`` is one on vLLM.
"""

from rerank import Shape, main

if __name__ == "__main__":
    shape = Shape("semantic_summary_small", words=14, summary_words=28, history=20)
    main(
        shape,
        [
            "packed",
            "packed,fp8=1",
            "packed,permutations=3",
            "packed,candidates=50",
            "raw",
            "job",
            "job,permutations=3",
            "job,candidates=9",
            "job,candidates=50",
        ],
        __doc__ or "",
    )
