"""Worlds from documents and triples: graphs, walks over them, questions, and the builder that writes a world."""
