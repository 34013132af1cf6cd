"""Full exact rankings per second from prompts with 20 pictures: ``vlrank rerank`` as a whole beside ``LLM.generate``.

    python bench/rerank_images.py --model QWEN3_VL_2B_FOLDER --out bench/results/rerank_images.json

Pictures of 224x224 from a catalogue of ``--items``, histories as text. ``raw`` gets decoded pictures without ids;
``job`` starts from files. Variants as in `rerank_text.py`.
"""

from rerank import Shape, main

if __name__ == "__main__":
    shape = Shape("raw_image", words=8, summary_words=0, history=20, side=224)
    main(shape, ["packed", "packed,fp8=1", "raw", "job", "job,permutations=3"], __doc__ or "")
