package relay

import (
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/txbox/txbox/internal/wire"
)

// cause says why the broker does not have a message.
type cause int

const (
	returned   cause = iota // no queue is bound for it
	nacked                  // a queue refused it
	missing                 // its exchange does not exist, or we may not write to it
	suspected               // as missing, but it was not tried
	impossible              // it can never be published
)

// maxBackOff bounds the pause between two attempts of one message.
const maxBackOff = time.Minute

// backOff is exponential with full jitter, from 1 s.
func backOff(failures int) time.Duration {
	limit := maxBackOff
	if failures < 6 {
		limit = min(limit, time.Second<<failures)
	}
	return rand.N(limit) + 10*time.Millisecond
}

// confirmed: the broker has the message.
func (r *Relay) confirmed(m *message) {
	r.suspects.clear(m.exchange)
	r.refusals.accepted(m)
	r.counts.published.Add(1)
	r.hand.confirm(m)
}

// refuse: the broker will not have it now, or ever. A message whose exchange is
// missing spends an attempt only as the probe; the others waited for nothing of
// their own fault.
func (r *Relay) refuse(m *message, why cause, text string) {
	v := verdict{message: m, reason: "retry", spend: 1, lastError: clip(text)}
	switch why {
	case impossible:
		v.reason = "dead"
		r.suspects.forget(m)
	case missing, suspected:
		if !m.alone {
			v.spend = 0
		}
		failures, lastError := r.suspects.missing(m, v.lastError)
		v.delay, v.lastError = backOff(failures), lastError
	default:
		r.suspects.clear(m.exchange)
	}
	if v.delay == 0 {
		v.delay = backOff(m.attempts)
	}
	m.alone = false
	r.refusals.refused(m, v.reason, v.lastError)
	r.counts.refused.Add(1)
	r.hand.refuse(v)
}

// unknown: the connection or channel ended before the answer. No attempt is
// spent; the message is published again.
func (r *Relay) unknown(m *message) {
	r.counts.unknown.Add(1)
	r.hand.retry(m)
}

// clip makes the broker's words fit for the table.
func clip(text string) string {
	text = strings.ToValidUTF8(strings.ReplaceAll(text, "\x00", ""), "?")
	const limit = 1000
	if len(text) > limit {
		text = strings.ToValidUTF8(text[:limit], "")
	}
	return text
}

// suspects are exchanges that the broker said are missing or closed to us. Each
// message to one would close a channel and disturb its neighbours, so they are
// parked, and one at a time is tried on a channel of its own.
type suspects struct {
	mu         sync.Mutex
	byExchange map[string]*suspect
}

type suspect struct {
	failures int
	why      string // in the broker's words
	probe    *message
	next     time.Time // of the next probe
}

// maxProbe bounds the pause between two probes of one exchange.
const maxProbe = 5 * time.Second

// admit says whether m may go out among others. If not, and no other message
// probes its exchange, m becomes the probe: alone is set.
func (s *suspects) admit(m *message) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	x := s.byExchange[m.exchange]
	if x == nil {
		return true
	}
	if m.parked && x.probe == nil && time.Now().After(x.next) {
		x.probe, m.alone = m, true
	}
	return false
}

// missing makes the exchange of m a suspect for the reason why, or counts the
// failure of its probe; "" is a message that was not tried. It returns how often
// probes have failed, and the reason.
func (s *suspects) missing(m *message, why string) (failures int, reason string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	x := s.byExchange[m.exchange]
	if x == nil {
		x = &suspect{why: why}
		s.byExchange[m.exchange] = x
	}
	if why != "" {
		x.why = why
	}
	if why != "" && x.probe == m {
		x.failures++
		x.probe = nil
		x.next = time.Now().Add(min(backOff(x.failures), maxProbe))
	}
	return x.failures, x.why
}

// forget ends the probe that m was, without a result.
func (s *suspects) forget(m *message) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if x := s.byExchange[m.exchange]; x != nil && x.probe == m {
		x.probe = nil
	}
}

// clear records that an exchange took a message.
func (s *suspects) clear(exchange string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.byExchange, exchange)
}

// publishing returns the message as it goes on the wire, or why it cannot: its
// row may have come from elsewhere than package outbox.
func (m *message) publishing() (amqp.Publishing, error) {
	for _, s := range []string{m.exchange, m.routingKey, m.typ, m.contentType} {
		if err := wire.CheckShortString(s); err != nil {
			return amqp.Publishing{}, err
		}
	}
	if err := wire.CheckHeaders(m.headers); err != nil {
		return amqp.Publishing{}, err
	}
	headers := make(amqp.Table, len(m.headers)+2)
	for name, value := range m.headers {
		headers[name] = value
	}
	if m.key != "" {
		headers[wire.KeyHeader] = m.key
	}
	headers[wire.CreatedAtHeader] = m.createdAt.UTC().Format(wire.CreatedAtFormat)
	return amqp.Publishing{
		Headers:      headers,
		ContentType:  m.contentType,
		DeliveryMode: amqp.Persistent,
		MessageId:    m.messageID.String(),
		Timestamp:    m.createdAt,
		Type:         m.typ,
		Body:         m.payload,
	}, nil
}
