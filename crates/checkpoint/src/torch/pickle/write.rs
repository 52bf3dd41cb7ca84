//! Writes pickles as torch does: protocol 2, so that every version of torch reads them, `weights_only` included.

use std::collections::HashMap;

use crate::tree::Node;

/// A pickle being written.
pub(in crate::torch) struct Writer {
    out: Vec<u8>,
    /// Names and classes that were written already, and their numbers.
    memo: HashMap<String, u32>,
}

impl Writer {
    pub(in crate::torch) fn new() -> Self {
        Self { out: vec![0x80, 2], memo: HashMap::new() }
    }

    pub(in crate::torch) fn finish(mut self) -> Vec<u8> {
        self.out.push(b'.');
        self.out
    }

    /// A class or function, by its name in Python.
    pub(in crate::torch) fn class(&mut self, module: &str, name: &str) {
        let text = format!("{module}\n{name}\n");
        if !self.recall(&text) {
            self.out.push(b'c');
            self.out.extend_from_slice(text.as_bytes());
            self.remember(text);
        }
    }

    pub(in crate::torch) fn none(&mut self) {
        self.out.push(b'N');
    }

    pub(in crate::torch) fn bool(&mut self, truth: bool) {
        self.out.push(if truth { 0x88 } else { 0x89 });
    }

    pub(in crate::torch) fn int(&mut self, int: i64) {
        if let Ok(int) = i32::try_from(int) {
            self.out.push(b'J');
            self.out.extend_from_slice(&int.to_le_bytes());
        } else {
            self.out.extend_from_slice(&[0x8a, 8]);
            self.out.extend_from_slice(&int.to_le_bytes());
        }
    }

    pub(in crate::torch) fn float(&mut self, float: f64) {
        self.out.push(b'G');
        self.out.extend_from_slice(&float.to_be_bytes());
    }

    /// Text; equal ones are written once.
    pub(in crate::torch) fn str(&mut self, text: &str) {
        let key = format!("\n{text}");
        if !self.recall(&key) {
            self.out.push(b'X');
            // Names and texts of more than 4 GiB do not fit a Python pickle of protocol 2 either.
            self.out.extend_from_slice(&(text.len() as u32).to_le_bytes());
            self.out.extend_from_slice(text.as_bytes());
            self.remember(key);
        }
    }

    /// Bytes, as protocol 2 has them: text in Latin-1, to be encoded.
    pub(in crate::torch) fn bytes(&mut self, bytes: &[u8]) {
        self.class("_codecs", "encode");
        let text: String = bytes.iter().map(|byte| char::from(*byte)).collect();
        self.out.push(b'X');
        self.out.extend_from_slice(&(text.len() as u32).to_le_bytes());
        self.out.extend_from_slice(text.as_bytes());
        self.str("latin1");
        self.tuple_of(2);
        self.call();
    }

    pub(in crate::torch) fn size(&mut self, size: usize) {
        self.int(size as i64);
    }

    /// A tuple of sizes.
    pub(in crate::torch) fn sizes(&mut self, sizes: &[usize]) {
        self.mark();
        sizes.iter().for_each(|size| self.size(*size));
        self.tuple();
    }

    /// `torch.Size`.
    pub(in crate::torch) fn torch_size(&mut self, sizes: &[usize]) {
        self.class("torch", "Size");
        self.sizes(sizes);
        self.tuple_of(1);
        self.call();
    }

    /// An instance of a class that takes no arguments; its state is to follow, then [`Writer::build`].
    pub(in crate::torch) fn instance(&mut self, module: &str, name: &str) {
        self.class(module, name);
        self.out.extend_from_slice(&[b')', 0x81]);
    }

    pub(in crate::torch) fn build(&mut self) {
        self.out.push(b'b');
    }

    pub(in crate::torch) fn mark(&mut self) {
        self.out.push(b'(');
    }

    /// A tuple of what follows the last mark.
    pub(in crate::torch) fn tuple(&mut self) {
        self.out.push(b't');
    }

    /// A tuple of the last 1 to 3 values.
    pub(in crate::torch) fn tuple_of(&mut self, count: u8) {
        self.out.push(0x84 + count);
    }

    pub(in crate::torch) fn call(&mut self) {
        self.out.push(b'R');
    }

    /// A reference to what is outside.
    pub(in crate::torch) fn persistent(&mut self) {
        self.out.push(b'Q');
    }

    /// A dict; keys and values are to follow, then [`Writer::end_dict`].
    pub(in crate::torch) fn begin_dict(&mut self) {
        self.out.extend_from_slice(b"}(");
    }

    pub(in crate::torch) fn end_dict(&mut self) {
        self.out.push(b'u');
    }

    /// A list; items are to follow, then [`Writer::end_list`].
    pub(in crate::torch) fn begin_list(&mut self) {
        self.out.extend_from_slice(b"](");
    }

    pub(in crate::torch) fn end_list(&mut self) {
        self.out.push(b'e');
    }

    /// A value that holds no tensor.
    pub(in crate::torch) fn node(&mut self, node: &Node) {
        match node {
            // Tensors have items of their own.
            Node::None | Node::Tensor => self.none(),
            Node::Bool(truth) => self.bool(*truth),
            Node::Int(int) => self.int(*int),
            Node::Float(bits) => self.float(f64::from_bits(*bits)),
            Node::Str(text) => self.str(text),
            Node::Bytes(bytes) => self.bytes(bytes),
            Node::List(items) => {
                self.begin_list();
                items.iter().for_each(|item| self.node(item));
                self.end_list();
            }
            Node::Map(entries) => {
                self.begin_dict();
                for (key, node) in entries {
                    self.str(key);
                    self.node(node);
                }
                self.end_dict();
            }
        }
    }

    fn recall(&mut self, key: &str) -> bool {
        let Some(nth) = self.memo.get(key) else { return false };
        self.out.push(b'j');
        self.out.extend_from_slice(&nth.to_le_bytes());
        true
    }

    fn remember(&mut self, key: String) {
        let nth = self.memo.len() as u32;
        self.out.push(b'r');
        self.out.extend_from_slice(&nth.to_le_bytes());
        self.memo.insert(key, nth);
    }
}
