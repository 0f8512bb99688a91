package relay

import (
	"testing"
	"time"

	"github.com/google/uuid"
	amqp "github.com/rabbitmq/amqp091-go"
)

func newMessage(id int64, key, routingKey string) *message {
	return &message{id: id, messageID: uuid.New(), key: key, destination: destination{routingKey: routingKey}, headers: amqp.Table{}}
}

// A read that began before a row was deleted still finds it. It must not bring the
// message back.
func TestReadThatBeganBeforeTheDeleteBringsNothingBack(t *testing.T) {
	h := newHand()
	row := func() []*message { return []*message{newMessage(1, "", "q")} }
	h.admit(row())
	taken := h.take(10)
	h.confirm(taken)
	confirmed, _ := h.toSettle(10)
	if len(confirmed) != 1 {
		t.Fatalf("%d to delete", len(confirmed))
	}
	h.deleted(confirmed[0]) // the DELETE returned, while another read is under way
	if n := h.admit(row()); n != 0 || len(h.take(10)) != 0 {
		t.Error("the message came back")
	}
	h.readEnded()
	if len(h.byID) != 0 {
		t.Error("it is remembered for ever")
	}
}

// While the hand is full of messages for a destination that confirms slowly, those
// for it that come are parked without an attempt, and the others go out.
func TestSlowDestinationDoesNotFillTheHand(t *testing.T) {
	h := newHand()
	id := int64(0)
	page := func(n int, to string) (ms []*message) {
		for range n {
			id++
			ms = append(ms, newMessage(id, "", to))
		}
		return ms
	}
	h.admit(page(1, "other")) // two destinations: half of the window each
	h.admit(page(handRows, "slow"))
	inFlight := h.take(handRows)
	if len(inFlight) > channels*window/2+1 {
		t.Fatalf("%d in flight", len(inFlight))
	}
	if !h.full() {
		t.Error("the reader goes on at once, when nobody knows that it is slow")
	}
	for _, m := range h.routes[destination{routingKey: "slow"}].ready {
		m.readyAt -= int64(2 * slowAfter)
	}
	if h.full() {
		t.Fatal("the reader waits for ever")
	}
	h.admit(append(page(100, "slow"), page(100, "other")...))
	_, refused := h.toSettle(handRows)
	for _, v := range refused {
		if v.routingKey != "slow" || v.reason != "retry" || v.spend != 0 || v.delay > slowDelay {
			t.Errorf("parked: %+v", v)
		}
	}
	if len(refused) != 100 {
		t.Errorf("%d parked", len(refused))
	}
	others := 0
	for _, m := range h.take(handRows) {
		if m.routingKey == "other" {
			others++
		}
	}
	if others != 100 {
		t.Errorf("%d of the others may go out", others)
	}
}

// A key that fills the hand waits in the table; others are still read.
func TestKeyThatStarvesTheHandIsPassedOver(t *testing.T) {
	h := newHand()
	var page []*message
	for i := range int64(handRows) {
		page = append(page, newMessage(i+1, string(rune('a'+i%20)), "q")) // 250 of each of 20 keys
	}
	h.admit(page)
	if n := len(h.take(handRows)); n != 20 {
		t.Fatalf("%d in flight", n)
	}
	if h.full() {
		t.Fatal("the reader waits, while 20 of 256 places are used")
	}
	h.admit([]*message{newMessage(handRows+1, "a", "q"), newMessage(handRows+2, "z", "q")})
	if h.byID[handRows+1] != nil || h.lines["a"].passed != handRows+1 {
		t.Error("one more of a waits in the hand")
	}
	if ms := h.take(10); len(ms) != 1 || ms[0].key != "z" {
		t.Errorf("may go out: %v", ms)
	}
}

// A message for which there is no room is not taken out of turn: what was passed over
// comes first.
func TestWhatWasPassedOverComesBeforeWhatIsNewer(t *testing.T) {
	h := newHand()
	var page []*message
	for i := range int64(lineRows + 10) {
		page = append(page, newMessage(i+1, "k", "q"))
	}
	h.admit(page)
	first := int64(lineRows + 2) // one is ready, lineRows wait
	if got := h.lines["k"].passed; got != first {
		t.Fatalf("passed over from %d on, not %d", got, first)
	}
	for range lineRows {
		h.confirm(h.take(1))
	}
	if n := h.admit([]*message{newMessage(5000, "k", "q")}); n != 0 {
		t.Error("a newer one was admitted")
	}
	lines, from := h.passedOver()
	if len(lines) != 1 || from != first {
		t.Fatalf("%d lines from %d on", len(lines), from)
	}
	if n := h.readmit(lines, page[first-1:], all); n != 9 || h.lines["k"].passed != 0 {
		t.Errorf("%d readmitted, passed over from %d on", n, h.lines["k"].passed)
	}
}

// Others wait for what is on trial: it goes first, and connections are kept for it.
func TestTrialsGoBeforeProbesAndProbesLeaveThemRoom(t *testing.T) {
	h := newHand()
	for id := range int64(3) {
		m := newMessage(id+1, "", "q")
		m.alone, m.onTrial, m.patience = true, id > 0, time.Second
		h.byID[m.id] = m
		h.pushAlone(m)
	}
	for _, c := range []struct {
		trialsOnly bool
		want       int64
	}{{false, 2}, {true, 3}, {true, 0}, {false, 1}, {false, 0}} {
		got := int64(0)
		for _, m := range h.takeAlone(c.trialsOnly) {
			got = m.id
		}
		if got != c.want {
			t.Errorf("taken: %d, not %d", got, c.want)
		}
	}
}

// Nothing more is taken for a destination that has yet to show that it answers.
func TestWhatIsOnTrialIsNotTaken(t *testing.T) {
	h := newHand()
	var page []*message
	for id := range int64(2 * channels * window) {
		page = append(page, newMessage(id+1, "", "q"))
	}
	h.admit(page)
	taken := h.take(len(page))
	h.apart(taken)
	h.try(taken)
	if n := len(h.take(len(page))); n != 0 {
		t.Errorf("%d taken", n)
	}
	h.confirm(h.takeAlone(true))
	if n := len(h.take(len(page))); n == 0 {
		t.Error("nothing is taken after the trial")
	}
}

// A key was blocked when its lane was lost. What is parked of it then, if anything, the
// next owner decides, who may be the same relay.
func TestBlockedKeyIsForgottenWithItsLane(t *testing.T) {
	h := newHand()
	head := newMessage(1, "k", "q")
	head.parked, head.behind = true, true
	h.admit([]*message{head})
	follower := newMessage(2, "k", "q")
	follower.behind = true
	h.admit([]*message{follower})
	_, refused := h.toSettle(10)
	if len(refused) != 1 {
		t.Fatalf("%d parked behind the head", len(refused))
	}
	h.recorded(refused[0])
	h.readEnded()
	for _, m := range h.take(10) {
		h.drop(m)
	}
	h.startOver(func(lane int16) bool { return lane == head.lane })
	h.admit([]*message{newMessage(3, "k", "q")})
	if _, refused := h.toSettle(10); len(refused) != 0 || len(h.take(10)) != 1 {
		t.Error("a message was parked behind a head that is gone")
	}
}
