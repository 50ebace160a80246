package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
)

// Who closes the pipe that is read from gets no error; a connection that was
// closed is one.
func TestClosedPipes(t *testing.T) {
	r, w, err := os.Pipe()
	if err := errors.Join(err, r.Close()); err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	var stderr bytes.Buffer
	if code := run(t.Context(), []string{"version"}, w, &stderr); code != failed || stderr.Len() > 0 {
		t.Errorf("with stdout closed: exit status %d, %q", code, &stderr)
	}
	gone := fmt.Errorf("read disk vda: %w", syscall.EPIPE)
	if code := end(t.Context(), gone, &output{w: &stderr}, &stderr); code != failed || !strings.Contains(stderr.String(), "vda") {
		t.Errorf("with a host gone: exit status %d, %q", code, &stderr)
	}
}
