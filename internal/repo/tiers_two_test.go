package repo

import (
	"errors"
	"maps"
	"strings"
	"testing"

	"holdfast/internal/blob"
)

// With two tiers each can make up for the other.
func TestTwoTiers(t *testing.T) {
	w := newFarWorld(t)
	near := new(blob.Mem)
	w.at["near"] = near
	o := all()
	o.Copy = true
	move(t, w.r, o)
	addTier(t, w.r, Tier{Name: "near", Location: "near"}, near)
	if report, err := w.r.Move(ctx, "near", all()); err != nil || report.Freed == 0 {
		t.Fatalf("%+v, %v", report, err)
	}
	move(t, w.r, o)
	for _, lost := range []string{"there", "near"} {
		at := maps.Clone(w.at)
		delete(at, lost)
		r := mustTiered(t, w.own, at)
		for _, p := range w.points {
			equal(t, r, p, w.contents[p.ID])
		}
		alone := mustTiered(t, w.at[lost], places{})
		for _, p := range w.points {
			equal(t, alone, p, w.contents[p.ID])
		}
	}
	if infos, err := w.r.TierInfos(ctx); err != nil || len(infos) != 2 || infos[0].Only+infos[1].Only != 0 || infos[0].Points != 2 || infos[1].Points != 2 {
		t.Errorf("%+v, %v", infos, err)
	}
	if _, err := w.r.RemoveTier(ctx, "far", RemoveTierOptions{Watch: -1}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.r.RemoveTier(ctx, "near", RemoveTierOptions{Watch: -1}); !errors.Is(err, ErrOnlyThere) {
		t.Fatal(err)
	}
	clean(t, w.r, true)
}

// Of two tiers the one that knows more takes over, and the other follows.
func TestTwoTiersTakeOver(t *testing.T) {
	w := newFarWorld(t)
	near, o := new(blob.Mem), all()
	w.at["near"] = near
	o.Copy = true
	move(t, w.r, o)
	addTier(t, w.r, Tier{Name: "near", Location: "near"}, near)
	move(t, w.r, o)
	w.add(t, "late", random(77, 1))
	if _, err := w.r.Move(ctx, "near", o); err != nil {
		t.Fatal(err)
	}
	r := mustTiered(t, w.far, w.at)
	if err := r.TakeOver(ctx, false); err == nil || !strings.Contains(err.Error(), "near") {
		t.Errorf("the one that knows less: %v", err)
	}
	r = mustTiered(t, near, w.at)
	if err := r.TakeOver(ctx, false); err != nil {
		t.Fatal(err)
	}
	move(t, r, o)
	clean(t, r, true)
	alone := mustTiered(t, w.far, w.at)
	for _, p := range w.points {
		equal(t, r, p, w.contents[p.ID])
		equal(t, alone, p, w.contents[p.ID])
	}
}
