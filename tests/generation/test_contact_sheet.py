"""The page that a person looks at before paying for GPU hours."""

from pathlib import Path

from PIL import Image

from vlrank.generation.contact_sheet import Card, write_contact_sheet


def test_the_page_shows_pictures_texts_and_problems_and_needs_no_other_file(tmp_path: Path) -> None:
    Image.new("RGB", (900, 600), "red").save(tmp_path / "a.jpg")
    cards = [
        Card(1, "Red <mug> & saucer", str(tmp_path / "a.jpg"), {"caption": "A <b>red</b> mug."}),
        Card(2, "Lamp", str(tmp_path / "missing.jpg"), {}, "PictureMissing: missing.jpg does not exist"),
        Card(3, "", None, {"semantic summary": "A vase."}),
    ]
    write_contact_sheet(tmp_path / "samples" / "caption.html", "caption: shop", "3 random items", cards)
    page = (tmp_path / "samples" / "caption.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/jpeg;base64,') == 1
    assert "Red &lt;mug&gt; &amp; saucer" in page
    assert "A &lt;b&gt;red&lt;/b&gt; mug." in page, "generated text must not become markup"
    assert "PictureMissing" in page
    assert "picture missing" in page
    assert "no picture" in page
    assert "http" not in page.replace("http-equiv", "")
