"""Draw four red hearts with the bundled model and save them beside what was retrieved for them."""

from knn_diffusion import KnnDiffusion

pipe = KnnDiffusion.from_pretrained("stickers")
out = pipe("a red heart", num_images_per_prompt=4, seed=0)

for number, image in enumerate(out.images):
    image.save(f"red-heart-{number}.png")
for neighbor in out.neighbors:
    print(f"{neighbor.score:.2f}  {neighbor.source}")
