"""What runs each golden vector, by subject. A module here registers its checks with `covers`."""
