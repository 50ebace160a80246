package libvirt

import (
	"net/url"
	"os/exec"
	"testing"
)

// Lesson 25: words from outside that reach a shell, here the one that ssh starts
// on a host, come through it as they are.
func TestLesson25Quoted(t *testing.T) {
	for _, word := range []string{"", "plain", "a b", "'", "'; touch owned; '", `\'`, "$(id)", "`id`", "a\nb", `"$HOME"`, "*", "-x", "ä"} {
		// Twice, as in a script within a command.
		script := "printf %s " + shellQuote(word)
		out, err := exec.Command("sh", "-c", "sh -c "+shellQuote(script)).Output()
		if err != nil || string(out) != word {
			t.Errorf("%q becomes %q, %v", word, out, err)
		}
	}
	for _, uri := range []string{"qemu+ssh://host/system;id", "qemu+ssh://host/$(id)", "qemu+ssh://host/system%3Bid"} {
		u, err := url.Parse(uri)
		if err != nil {
			t.Fatal(err)
		}
		if a, err := parseAddress(u); err == nil {
			t.Errorf("%s: path %q", uri, a.path)
		}
	}
}
