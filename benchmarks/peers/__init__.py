"""Other packages, called as their own examples do, on the images and by the recipe of the studies here."""
