"""The paper's evaluation (section 5): restoration and question answering."""
