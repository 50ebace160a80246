package node

import (
	"errors"
	"strings"
	"testing"

	"holdfast/internal/repo"
)

func TestChoosePoints(t *testing.T) {
	points := []repo.Point{
		{ID: "aaaa1111", VM: "web", Host: "h1", History: "1"},
		{ID: "aaaa2222", VM: "web", Host: "h1", History: "1"},
		{ID: "bbbb1111", VM: "db", Host: "h1", History: "2"},
		{ID: "cccc1111", VM: "db", Host: "h2", History: "3"},
		{ID: "dddd1111", VM: "bbbb", Host: "h1", History: "4"},
	}
	for _, c := range []struct {
		words string
		want  string // ids, with ! for those named by id
		usage string // of the error
	}{
		{"web", "aaaa1111 aaaa2222", ""},
		{"aaaa1 web", "aaaa1111! aaaa2222", ""},
		{"web@latest h2/db", "aaaa2222! cccc1111", ""},
		{"db", "", "several VMs"},
		{"aaaa", "", "ambiguous"},
		{"aaa", "", "at least 4"},
		{"bbbb", "", "is a VM, and the beginning of the id of restore point bbbb1111; say h1/bbbb"},
		{"h1/bbbb bbbb1", "bbbb1111! dddd1111", ""},
	} {
		picked, failed, err := choosePoints(points, strings.Fields(c.words))
		var got []string
		for _, p := range points {
			switch picked[p.ID] {
			case byID:
				got = append(got, string(p.ID)+"!")
			case ofItsVM:
				got = append(got, string(p.ID))
			}
		}
		var wrong *UsageError
		switch {
		case c.usage != "":
			if !errors.As(err, &wrong) || !strings.Contains(err.Error(), c.usage) {
				t.Errorf("%s: %v, want %q", c.words, err, c.usage)
			}
		case err != nil || len(failed) > 0 || strings.Join(got, " ") != c.want:
			t.Errorf("%s: %v, %v, %v", c.words, got, failed, err)
		}
	}
	picked, failed, err := choosePoints(points, []string{"nobody", "web"})
	if err != nil || len(picked) != 2 || len(failed) != 1 || !errors.Is(failed[0].Err, repo.ErrNotExist) || CopyFailed(failed) == nil {
		t.Errorf("%v, %v, %v", picked, failed, err)
	}
}
