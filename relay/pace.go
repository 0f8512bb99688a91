package relay

import "time"

// pace keeps what may take long to a part of the time.
type pace struct{ next time.Time }

const (
	paceShare = 50               // one part of the time, unless that is
	paceMost  = 10 * time.Second // longer apart
)

func (p *pace) due() bool { return !time.Now().Before(p.next) }

// ran records that it was done since began.
func (p *pace) ran(began time.Time) {
	p.next = time.Now().Add(min(paceShare*time.Since(began), paceMost))
}
