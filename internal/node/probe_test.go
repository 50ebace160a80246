package node

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"holdfast/internal/blob"
	"holdfast/internal/repo"
)

// tried is a store that says this of itself when it is tried.
type tried struct {
	blob.Store
	err error
}

func (s tried) Probe(context.Context) error { return s.err }

// A check lists what the store is caught at; that it cannot be tried is no
// damage.
func TestTry(t *testing.T) {
	var notes []string
	n := New(Options{Report: Report{Note: func(line string) { notes = append(notes, line) }}})
	ctx, cancel := context.WithCancel(context.Background())
	caught, err := n.try(ctx, tried{err: fmt.Errorf("%w: it forgets", blob.ErrUnfit)})
	if r := withProblems(&repo.CheckReport{}, caught); err != nil || len(r.Problems) != 1 || r.Problems[0].Object != "store" || !strings.Contains(r.Problems[0].What, "forgets") {
		t.Errorf("%+v, %v", caught, err)
	}
	if caught, err := n.try(ctx, tried{err: errors.New("read-only")}); len(caught) != 0 || err != nil || len(notes) != 1 {
		t.Errorf("%+v, %v, notes %q", caught, err, notes)
	}
	if caught, err := n.try(ctx, new(blob.Mem)); len(caught) != 0 || err != nil {
		t.Errorf("%+v, %v", caught, err)
	}
	cancel()
	if _, err := n.try(ctx, tried{err: ctx.Err()}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}
