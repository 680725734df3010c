"""Makes senses.jsonl.gz: python3 senses.py DICT OUT, with the `dict` folder of WordNet 3.1."""
import gzip, json, random, sys

PER_FILE, VERBS = 84, 400


def synsets(path):
    for line in open(path, encoding="latin-1"):
        if line.startswith("  "):
            continue
        data, gloss = line.split(" | ", 1)
        fields = data.split()
        words = [fields[4 + 2 * i].replace("_", " ") for i in range(int(fields[3], 16))]
        gloss = gloss.split('; "')[0].strip()
        if len(gloss) >= 12:
            yield int(fields[1]), ", ".join(words), gloss


def main(folder, out):
    rng, lines = random.Random(22), []
    nouns, seen = {}, set()
    for file, words, gloss in synsets(f"{folder}/data.noun"):
        if gloss not in seen:
            seen.add(gloss)
            nouns.setdefault(file, []).append((words, gloss))
    for file in sorted(nouns):
        chosen = rng.sample(nouns[file], min(PER_FILE, len(nouns[file])))
        held = len(chosen) // 7
        for i, (words, gloss) in enumerate(chosen):
            split = "test" if i < held else "validation" if i < 2 * held else "train"
            lines.append({"split": split, "file": file - 3, "words": words, "gloss": gloss})
    verbs = {gloss: words for _, words, gloss in synsets(f"{folder}/data.verb")}
    for gloss, words in rng.sample(sorted(verbs.items()), VERBS):
        lines.append({"split": "verb", "words": words, "gloss": gloss})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    with open(out, "wb") as raw, gzip.GzipFile("", "wb", 9, raw, 0) as packed:
        packed.write(text.encode())
    print(len(lines), "lines")


main(*sys.argv[1:])
