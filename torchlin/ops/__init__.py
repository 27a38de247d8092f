"""One file a family: reference, fake, autograd and the public function of each op."""
