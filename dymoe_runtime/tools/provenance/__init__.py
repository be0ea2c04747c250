"""What a bundle was made from, in the forms that supply chains know, and signatures of it."""
